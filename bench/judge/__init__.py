"""Judge: the record, the target, the rules, and the verdict that follows."""
