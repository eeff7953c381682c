"""Edge packs: base models as graphs and mappable weights, on which onnxruntime trains without torch.

`fedtune.edge.pack` reads a pack and needs numpy only; the other modules write packs and need torch and onnx. The
package exports nothing, so that devices can import its reader alone.
"""
