"""The from-scratch study (Zebra, arXiv 2312.08618, section 3): its models, grids, claims and page."""
