"""DynaKV: decode past what DRAM holds, from clusters on flash that follow the decode (arXiv 2511.07427)."""
