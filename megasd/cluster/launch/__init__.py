"""`megasd launch`: a run handed to Slurm or to nemo-run. Imports neither torch nor nemo_run."""
