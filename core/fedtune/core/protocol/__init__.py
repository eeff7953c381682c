"""What server and devices say to each other: typed payloads with bounded sizes, and the files that they exchange."""
