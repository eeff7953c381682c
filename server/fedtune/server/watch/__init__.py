"""Looking at a run while it goes on, over HTTP on this machine: metrics for Prometheus, and a live page for people."""
