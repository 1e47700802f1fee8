"""`cascade batch`: one graph for each row of a table, in this process, on ComfyUI servers or on Ray's workers."""
