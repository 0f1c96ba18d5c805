"""The program and its parts: ops, graph and weights, typed views of attention sites, the cache plan, checks."""
