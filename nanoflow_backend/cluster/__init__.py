"""This package completes lines on the machines of a Ray cluster. It needs the extra `cluster`; nothing else imports Ray."""
