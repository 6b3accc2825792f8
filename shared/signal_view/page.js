for (const field of document.querySelectorAll('input[type=search]')) {
  const samples = [...document.querySelectorAll('#' + field.dataset.of + ' > details')];
  const count = document.getElementById(field.dataset.of + '-count');
  const look = () => {
    const wanted = field.value.toLowerCase();
    let shown = 0;
    for (const sample of samples) {
      const found = sample.textContent.toLowerCase().includes(wanted);
      sample.hidden = !found;
      shown += found;
    }
    count.textContent = shown + ' of ' + samples.length;
  };
  field.addEventListener('input', look);
  look();
}
