"""The measurements of Kim et al. (arXiv 2603.24472) on the effects of privileged text.

They measure the length of responses and their words of doubt. No torch at import.
"""
