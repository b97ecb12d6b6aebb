"""Dev loss over forward passes of tuners on tasks that their meta-training has not seen."""
