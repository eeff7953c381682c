"""The client: local training on a device, behind a Flower ClientApp. It never imports the server."""
