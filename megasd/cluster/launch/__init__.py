"""Submitting a run to a cluster: `megasd launch slurm` and `megasd launch nemo-run`. Nothing here
imports torch or nemo_run at import.
"""
