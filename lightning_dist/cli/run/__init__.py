"""What one run of ``lightning-dist train`` reads and writes in its folder."""
