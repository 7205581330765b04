"""Optimizers, schedules and gradients."""
