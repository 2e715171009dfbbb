"""Readers of users' data for workload authors: pictures, tables, text. They know no workload and no torch."""
