"""Where things run and live: workspace, tracking, bundles, cluster, doctor."""
