"""Tools for those who change the trainer; nothing here is needed to train."""
