// What the lab of the chapters adds to JupyterLab, as the container of a federated module that nobody has to build.
// 1. notebooks/NN_slug.py is a file type of its own, which opens as a notebook; other Python files open as text, as everywhere.
// 2. Saving a chapter tangles it. What came of it arrives as an event from the server (contents.py) and is shown in the page.
(() => {
  const TANGLED = 'urn:annotated-speedrun:tangled';
  let scope;

  // a module that JupyterLab shares with its extensions
  const shared = async name => (await Object.values(scope[name])[0].get())();

  const chapters = {
    id: 'speedrun-lab:chapters',
    autoStart: true,
    activate: app => {
      const { icon } = app.docRegistry.getFileType('notebook');
      const type = { name: 'chapter', displayName: 'Chapter', contentType: 'notebook', fileFormat: 'json', icon };
      app.docRegistry.addFileType({ ...type, extensions: [], pattern: '^\\d\\d_.+\\.py$' }, ['Notebook']);
    }
  };

  // a bar over a notebook, as high as its text
  const bar = (Widget, text) => {
    const node = document.createElement('div');
    node.className = 'speedrun-not-tangled';
    node.setAttribute('role', 'alert');
    node.textContent = text;
    node.style.cssText =
      'white-space: pre-wrap; overflow: auto; box-sizing: border-box; padding: 8px 16px; font-size: var(--jp-ui-font-size1);' +
      `min-height: ${Math.min(3 + 1.6 * text.split('\n').length, 12)}em; color: var(--jp-ui-font-color1);` +
      'background: var(--jp-layout-color2); border-left: 4px solid var(--jp-error-color1);';
    return new Widget({ node });
  };

  const tangled = {
    id: 'speedrun-lab:tangled',
    autoStart: true,
    activate: async app => {
      const { Notification } = await shared('@jupyterlab/apputils');
      const { Widget } = await shared('@lumino/widgets');
      let shown = [];  // the bars, which the next save takes away
      let said = null;  // the last note, which goes when something else is said
      app.serviceManager.events.stream.connect((_, { schema_id, path, changed, error, note }) => {
        if (schema_id !== TANGLED) {
          return;
        }
        const recovered = shown.length > 0;
        shown.forEach(each => each.dispose());
        shown = [];
        if (said) {
          Notification.dismiss(said);
          said = null;
        }
        if (error) {
          const words = `Saved, but not tangled: the package is as it was.\n${error}`;
          for (const panel of app.shell.widgets('main')) {
            if (panel.context?.path === path) {
              shown.push(bar(Widget, words));
              panel.contentHeader.addWidget(shown.at(-1));
            }
          }
          if (!shown.length) {
            said = Notification.error(words, { autoClose: false });
          }
        } else if (note) {
          said = Notification.info(note, { autoClose: 8000 });
        } else if (changed.length || recovered) {
          const words = changed.length ? `Saved, and tangled into ${changed.join(', ')}` : 'Saved. The package is what the chapters say.';
          said = Notification.success(words, { autoClose: 6000 });
        }
      });
    }
  };

  window._JUPYTERLAB = window._JUPYTERLAB || {};
  window._JUPYTERLAB['speedrun-lab'] = {
    init: given => { scope = given; },
    get: async () => () => ({ __esModule: true, default: [chapters, tangled] })
  };
})();
