"""`npr bench NAME`: measurements as commands. Medians of repeated runs; ratios come from one run on one machine.

each module: measure() ─► list of records ─► printed as a table, or as JSON with --json
"""
