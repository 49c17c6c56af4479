"""One verb a module: backup, restore, verify, forget, prune ...  Each takes what it works on, options, and a job."""
