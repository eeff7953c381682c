"""What runs on a device: local training behind a Flower ClientApp. It never imports the server."""
