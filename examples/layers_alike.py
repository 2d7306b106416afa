"""How alike are the layers of a store?

Run: python examples/layers_alike.py actstore-demo/store
"""

import sys

import actstore

store = actstore.open(sys.argv[1])
similarity = store.similarity(["mlp_post"], tolerance=0.01)
print(similarity)
print(
    store.sql(
        "SELECT site_a, site_b, round(value, 3) AS cka, round(high - low, 3) AS width "
        "FROM similarity JOIN sites AS a ON a.site = site_a JOIN sites AS b ON b.site = site_b "
        "WHERE result = $result AND b.layer = a.layer + 1 ORDER BY a.layer",
        result=similarity.name,
    )
)
