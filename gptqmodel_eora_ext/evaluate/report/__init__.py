"""The report: one HTML file that stands alone, made from a record (`evaluate.record`)."""
