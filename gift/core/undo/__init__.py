"""Undo of fine-tuning: snapshots, transactions and copy on write. Changes are made elsewhere."""
