"""Questions with known answers: needles, RULER, InfiniteBench, documents, short questions; texts and scoring."""
