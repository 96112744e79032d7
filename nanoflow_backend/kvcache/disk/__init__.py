"""The disk tier keeps payloads of KV pages in files that are whole or refused, in a folder that engines share."""
