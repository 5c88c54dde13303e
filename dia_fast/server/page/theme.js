// Not a module: it runs before the first paint, so that a dark page does not flash in white.
try {
  const theme = localStorage.getItem("dia-fast.theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch { /* storage is switched off */ }
