"""What a sweep of runs needs beside them: launching, checks, pruning, its report."""
