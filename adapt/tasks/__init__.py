"""The four domains: rows with public columns, verifiable rewards, a confined sandbox, disjoint splits."""
