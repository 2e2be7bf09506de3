"""Differential privacy: mechanisms, noise, accounting, and a ledger of what was spent."""
