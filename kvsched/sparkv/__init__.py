"""SparKV: a long prefix's KV cache, partly streamed from a store and partly computed (arXiv 2604.21231)."""
