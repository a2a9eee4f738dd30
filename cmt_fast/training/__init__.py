"""Training a CMT: data, one epoch, the whole run, history, plots and the report of the demo."""
