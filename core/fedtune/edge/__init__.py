"""Edge packs: base models as graphs and mappable weights, on which onnxruntime trains without torch.

`pack` reads a pack, `pack_facts` its facts, and `pack_contents` and `graph_files` check its files; they need
numpy only. `pack_writer` writes packs, with `blocks` and `graph_export`, and needs torch and onnx. The package exports
nothing, so that devices can import its reader alone.
"""
