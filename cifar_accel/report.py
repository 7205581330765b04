"""Plots, tables and the page, from the files in run folders."""
def plot_run(path, say): pass
