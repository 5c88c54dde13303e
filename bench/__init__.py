"""One file per question asked; each prints the machine and its baseline beside every number."""
