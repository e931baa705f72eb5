"""Context parallelism: who has which part of a sequence, what ranks send each other, attention over all parts."""
