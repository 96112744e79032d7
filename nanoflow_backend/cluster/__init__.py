"""This package completes lines on the machines of a Ray cluster, with the extra `cluster`. Nothing else imports Ray."""
