"""Tiers of the KV cache below the device: host memory, then an SSD.

Pages are copied whole, once they are full and their tokens known, by the copy engines beside the
step that follows. Copying what each layer has written as soon as it has would move the same bytes
through the same engines, and gain nothing that is wanted:

- It would be done earlier by one step at most. A page is waited for only when it is to be granted
  anew, and that is when its request has ended or given way, mostly many steps after it was filled.
- A request that decodes fills a page once in block_size steps. Its rows one by one would be as many
  times more copies, of some kilobytes each, which no copy engine does at full speed; a page of a
  layer is one run (256 KiB in Llama-3.1-8B), so it needs no kernel to gather or scatter it either.
- Copies within a step are operations of its graph, whose addresses are fixed: rows would have to be
  gathered into a ring of buffers first, by SMs, and out of it into the host's slots by its threads.

So a step pays only for planning the copies and giving them to a lane of their own.
bench/multi_round.py measures what is lost (`without_reuse`), the bandwidths, and the device's idle
share; a page is granted anew only when its copies are done (scheduler/copies.py).
"""
