"""Durable records of the service: jobs, files, keys, leases, money. The only SQL there is; no torch."""
