"""The way back: snapshots, transactions, copies on write. What changes a network is elsewhere."""
