"""One prompt, one line: which tokens drive the strongest neurons of each layer?

Run: python examples/one_prompt.py path/to/model "The keys to the cabinet are on the table"
"""

import sys

import actstore

model, text = sys.argv[1], sys.argv[2]
store = actstore.capture(model, text=text)
print(store.info())
strongest = store.sql(
    "SELECT layer, neuron, max FROM neurons WHERE hook = 'mlp_post' "
    "QUALIFY row_number() OVER (PARTITION BY layer ORDER BY max DESC) = 1 ORDER BY layer"
)
for row in strongest:
    (best,) = store.top(f"mlp_post.{row['layer']}", row["neuron"], k=1)
    print(
        f"layer {row['layer']:>2}  neuron {row['neuron']:>5}  {best['value']:6.2f}  "
        f"…{best['before']}[{best['token']}]{best['after']}…"
    )
