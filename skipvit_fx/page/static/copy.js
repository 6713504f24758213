// A button that copies a text of the page, and says so.
"use strict";

// `text` is an element, or a function that returns one; without a button there is nothing to copy.
function copying(button, text) {
  if (!button) return;
  const said = button.parentElement.querySelector("[role=status]");
  button.addEventListener("click", async () => {
    const source = typeof text === "function" ? text() : text;
    try {
      await navigator.clipboard.writeText(source.textContent);
      said.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(source); // where a page from disk may not write to the clipboard
      said.textContent = "Selected: copy it with the keyboard.";
    }
  });
}
