"""What `lqf-forget` is made of: purging what the samples left, certificates, and a report for the privacy officer."""
