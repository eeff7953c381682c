"""The client: local training on a device, and its answers to the server's messages. It never imports the server."""
