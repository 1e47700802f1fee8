/** Stable Cascade in ComfyUI's interface: panels on the nodes that have something to show. */

import { app } from "../../scripts/app.js";
import { translateExample } from "./example_words.js";
import { loadPresets, offerPresets } from "./presets.js";
import { loadReplacements, offerReplacement } from "./replace.js";
import { addRunPanel } from "./run_panel.js";
import { addSearchWords } from "./search.js";
import { listen, loadSentences } from "./sentences.js";
import { addSizePanel } from "./size_panel.js";
import { addSyntaxPanel } from "./syntax_panel.js";
import { arrangeTemplates } from "./templates.js";
import { addTextPanel } from "./text_panel.js";
import { loadWords } from "./words.js";

const PANELS = {
  CascadeEmptyLatent: addSizePanel,
  CascadeEncode: addSizePanel,
  CascadeUpscaleLatent: addSizePanel,
  CascadeSuperResolutionHint: addSizePanel,
  CascadePriorSampler: addRunPanel,
  CascadeDecoderSampler: addRunPanel,
  CascadeLoRAApply: addTextPanel,
  CascadeTextEncode: addSyntaxPanel,
};

listen();
arrangeTemplates();
app.registerExtension({
  name: "cascade_nodes.panels",
  init: () => Promise.all([loadWords().then(loadSentences), loadReplacements(), loadPresets()]),
  beforeRegisterVueAppNodeDefs: addSearchWords,
  afterConfigureGraph: translateExample,
  nodeCreated(node) {
    PANELS[node.comfyClass]?.(node);
    offerReplacement(node);
    offerPresets(node);
  },
});
