"""Deliveries on a developer's machine: the API asked from elsewhere, and a local server fed from it."""
