"""One running job: lifecycle, membership, failures, sample order, ledger, advisor."""
