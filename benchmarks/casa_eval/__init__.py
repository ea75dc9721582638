"""`casa eval`: the published evaluation protocol of the CASA models, on local data."""
