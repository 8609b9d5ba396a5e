"""Memory of a process when several divide a run's state."""
