"""Processes that do the service's work: one leases jobs and trains, one answers prompts. Started by `kivnun serve` or by hand."""
