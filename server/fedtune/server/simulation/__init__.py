"""A whole federation on one machine: Flower's Grid in one process, clients on this process or a pool of Ray actors."""
