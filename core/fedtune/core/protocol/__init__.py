"""The protocol of server and devices: typed payloads of bounded sizes, and the files that they exchange."""
