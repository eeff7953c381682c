"""Simulation of a federation on one machine: a Flower Grid in this process, clients here, in forks or in Ray actors."""
